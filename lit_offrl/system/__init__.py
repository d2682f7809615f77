"""The operating system: cores, ranks, memory, files, locks, child processes, progress bars."""
