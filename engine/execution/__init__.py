"""What every rank does with a plan: look its sequences up, run its stage, sample at the last one."""
