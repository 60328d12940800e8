"""The program: a config becomes a training loop."""
