"""Readers of file formats: from a file to `Transitions`. Which file a dataset is, the sources know."""
