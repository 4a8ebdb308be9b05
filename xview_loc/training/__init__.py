"""Training: resumable trainer, the authors' losses, randomly turned panoramas."""
