"""The memory oracle: a workload that knows what every page of its memory must be."""
