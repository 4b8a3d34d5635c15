"""Sweeps: many trainings of varied recipes over seeds, and what they say."""
