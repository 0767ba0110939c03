"""Training: the step, how it is compiled and launched, the epochs around it, and which step a method takes."""
