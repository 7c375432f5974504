"""Before torch and the library start their threads, which share the processor with each other and with other tests."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KVW_THREADS", "2")
