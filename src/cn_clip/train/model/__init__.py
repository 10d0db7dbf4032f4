"""The model that a stage trains: initial weights, frozen parameters, LoRA."""
