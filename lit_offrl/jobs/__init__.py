"""Several commands at once: the seeds of a training, the runs of a grid."""
