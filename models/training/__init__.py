"""Trains the small LLaVA of the box, from nothing to a Hugging Face folder: python -m models.training WORK (see __main__.py)."""
