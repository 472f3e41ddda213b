"""The doctor: facts gathered from files and processes (facts.py), pure checks over them (checks/), findings."""
