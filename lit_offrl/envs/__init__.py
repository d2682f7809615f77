"""The environment of a dataset, episodes in several copies of it, films of them, and reference scores."""
