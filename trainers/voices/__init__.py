"""Reasonings in many voices, one YAML file a writer: what organisms are fine-tuned on."""
