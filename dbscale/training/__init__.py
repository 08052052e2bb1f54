"""Where study, data and kernels meet: one loop that pretrains, distills and finetunes, and `run.run_cell` around it.

Read `run` for a cell's life, `loop` for its training. Where and when cells run is launch's.
"""
