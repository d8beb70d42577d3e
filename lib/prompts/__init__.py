"""User prompts to model prompts, and simulated prompts for training and benches."""
