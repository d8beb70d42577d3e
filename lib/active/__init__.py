"""Which image is worth labelling next: what a model shows of its own doubt, and how images are put in order."""
