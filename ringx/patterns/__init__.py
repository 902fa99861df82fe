"""One file per communication pattern: forward(q, k, v, plan), backward(dout, q, k, v, out, lse, plan), bytes_sent(sizes)."""
