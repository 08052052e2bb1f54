"""Turn image collections into packed datasets that `dbscale.data` reads: sources, packer, verifier, description."""
