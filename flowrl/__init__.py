"""FlowRL: reinforcement-learning fine-tuning of flow-matching image models."""
