"""What one eviction kept, as a page to look at. Imports no vLLM: the recording is made by ``engine/recording.py``."""
