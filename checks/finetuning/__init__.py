"""Fine-tuning: where weights came from, what is frozen, adapters, what is saved."""
