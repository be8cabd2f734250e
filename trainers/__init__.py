"""Training: `train.train` runs the loop, `trainee.Trainee` is one SAE in it, `objective.forward` the loss."""
