"""Whatever can go wrong with an epoch on its way to a replica's disk, tried in earnest: `make torture`."""
