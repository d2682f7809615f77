"""Collection of offline datasets: behavior policies, and the recorder that runs them in the real environments."""
