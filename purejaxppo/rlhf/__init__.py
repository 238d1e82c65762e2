"""Reinforcement learning from human feedback: language models, and tasks with known answers."""
