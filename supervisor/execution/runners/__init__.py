"""What does a run's work: ``command`` (a process) and ``chat`` (an OpenAI-compatible
endpoint), behind the one ``protocol`` that they share."""
