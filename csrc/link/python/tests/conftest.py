"""Before torch and the library start their threads: two each are enough, and they share the machine with other tests."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("KVW_THREADS", "2")
