"""The LightningModules: policy (the only one handed to the Trainer), reference and reward."""
