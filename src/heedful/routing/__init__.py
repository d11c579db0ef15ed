"""Who sees whom, decided by the data: routing rules that give a selection."""
