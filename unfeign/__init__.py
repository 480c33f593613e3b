"""Unfeign: train policies to surface and reject alignment faking, and audit what they did.

The four folders are the architecture: `unfeign.envs` (what the policy is asked), `unfeign.rewards` (what a transcript
is worth), `unfeign.trainers` (how the policy learns) and `unfeign.split_persona` (who checks). Importing this package
loads neither torch nor any of them.
"""

__version__ = "0.1.0"
