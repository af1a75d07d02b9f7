"""From a config or a command to a watched program: finding it, starting it, ending it, undoing its traces."""
