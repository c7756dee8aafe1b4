"""Rollouts: the slot engine that samples, the turn loop that runs tools, and the trajectories they make."""
