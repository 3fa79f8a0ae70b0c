"""From a fine-tuned small language model to Foundry Local in one Prefect flow."""
