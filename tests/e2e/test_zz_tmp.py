import time, threading
from tests.e2e.conftest import *
from tests.support.device import load_on
from tests.support.models import samples, ABOVE
X=samples(4); HOT=X.copy(); HOT[:,0]=ABOVE
def test_crash(make_site):
    s=make_site(update={"probation_s":0.8,"probation_max_s":25.0,"probation_min_requests":40})
    v1=s.publish("mm",1); v2=s.publish("mm",2,fault="crash_above")
    t0=time.monotonic(); out=[]; stop=[]
    def tail():
        with open(s.device.log_path) as f:
            while not stop:
                l=f.readline()
                if l: out.append(f"{time.monotonic()-t0:6.2f} {l.rstrip()[:150]}")
                else: time.sleep(.01)
    th=threading.Thread(target=tail); th.start()
    with load_on(s.device,"mm",HOT) as load:
        s.desire(v1); s.operator.wait_settled("mm"); load.wait_for(60)
        out.append(f"{time.monotonic()-t0:6.2f} DEPLOY")
        print(s.deploy(v2))
        out.append(f"{time.monotonic()-t0:6.2f} SETTLED")
        load.wait_for(4); out.append(f"{time.monotonic()-t0:6.2f} 4"); load.wait_for(20); out.append(f"{time.monotonic()-t0:6.2f} 20")
    out.append(f"{time.monotonic()-t0:6.2f} unloaded")
    stop.append(1); th.join(); print("\n".join(out))
