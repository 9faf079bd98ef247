"""A small language model on bytes: its data, training, evaluation and the study of attentions; see docs/quality.md."""
