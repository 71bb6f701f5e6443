"""Find and remove backdoor samples from image training data before fine-tuning."""

__version__ = "0.1.0"
