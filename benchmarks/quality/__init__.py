"""How well runs end: real fine-tuning tasks, several methods, several seeds."""
