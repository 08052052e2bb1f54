from dbscale.data import make_loader as make_loader
from dbscale.data import open_dataset as open_dataset
from dbscale.kernels import kd_loss as kd_loss
from dbscale.launch.api import compare as compare
from dbscale.launch.api import find_boundary as find_boundary
from dbscale.launch.api import hunt_next as hunt_next
from dbscale.launch.api import hunt_verdicts as hunt_verdicts
from dbscale.launch.api import load_grid as load_grid
from dbscale.launch.api import plan as plan
from dbscale.launch.api import read_rows as read_rows
from dbscale.laws import fit_law as fit_law
from dbscale.laws import select_law as select_law

__version__: str
