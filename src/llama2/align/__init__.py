"""From preferences to behaviour: sampling from the model in training, rewards, rejection sampling, PPO, GRPO, RLOO."""
