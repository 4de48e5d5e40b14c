"""Pretraining of the language model on the walkthroughs of other games."""
