"""The writer's side of JetStream."""
