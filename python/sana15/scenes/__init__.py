"""Rendered compositional scenes in GenEval's grammar: prompts, a renderer, and a pixel checker that judges pictures."""
