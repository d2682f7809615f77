"""From a source file to blocks of minibatches on the training device."""
