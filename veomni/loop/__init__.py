"""What a step does and reports: agreement of ranks, losses, evaluation, checkpoint schedule, randomness."""
