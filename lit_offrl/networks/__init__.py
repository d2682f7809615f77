"""Networks, torch only."""
