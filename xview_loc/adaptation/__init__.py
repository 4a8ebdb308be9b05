"""Adaptation to a new area without ground truth, by knowledge self-distillation (ECCV 2024)."""
