"""How the policy learns: configuration, rollouts, GRPO, checkpoints, and the organisms that runs start from."""
