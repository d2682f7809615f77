"""Lightning callbacks: target networks, rollouts, run folder, checkpoints, progress."""
