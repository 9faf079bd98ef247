"""What is correct: the dense oracle, its gradients, inputs and tolerances. Imports torch, and nothing else of ours."""
