"""What is known about each feature of an SAE, and the pages that show it."""
