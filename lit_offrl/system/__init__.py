"""What the package asks of the machine: cores, ranks, memory, files, progress bars."""
