"""What is right: the dense oracle, its gradients, inputs and tolerances. It imports torch, and nothing of the rest."""
