"""Training: the authors' losses, the resumable trainer and turned panoramas."""
