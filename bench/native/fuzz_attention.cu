#include <cstdio>
#include <random>
#include <vector>
#include <cstring>
#include <algorithm>
#include <cmath>
#include "attention/params.h"
#include "base/check.h"
using namespace specrt;
typedef uint16_t u16;
static u16 tobf(float f){uint32_t u; memcpy(&u,&f,4); u += 0x7fff + ((u>>16)&1); return u>>16;}
static float fromf(u16 h){uint32_t u=(uint32_t)h<<16; float f; memcpy(&f,&u,4); return f;}
template<class T> T* up(const std::vector<T>& v){T* p; SPECRT_CUDA_CHECK(cudaMalloc(&p, v.size()*sizeof(T)+16)); SPECRT_CUDA_CHECK(cudaMemcpy(p,v.data(),v.size()*sizeof(T),cudaMemcpyHostToDevice)); return p;}
struct Spec { int dim, kvh, gh, page, window, form; std::vector<int> prefix; std::vector<std::vector<std::vector<int>>> trees; int capRows; int requestsSaid; const char* name; };
// form 0 none, 1 ancestors, 2 paths
static int failures=0;
static std::mt19937 rng(7);
static float gauss(){ static std::normal_distribution<float> d; return d(rng);}
struct Data { int B, maxPages, pages; std::vector<int> table; std::vector<u16> k,v; };
static void run(AttentionParams p, std::vector<u16>& out, int reps=1){
  AttentionPlanParams pp{p.row_request,p.row_prefix,p.ancestors,p.paths,p.num_rows,const_cast<int*>(p.plan),p.rows,p.requests,p.q_heads,p.kv_heads,p.path_depth};
  SPECRT_CUDA_CHECK(cudaMemset(p.out,0xff,(size_t)p.rows*p.q_heads*p.head_dim*2));
  launch_attention_plan_cuda(pp,nullptr);
  for(int i=0;i<reps;++i) launch_tree_attention_cuda(p,nullptr);
  SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
  out.resize((size_t)p.rows*p.q_heads*p.head_dim);
  SPECRT_CUDA_CHECK(cudaMemcpy(out.data(),p.out,out.size()*2,cudaMemcpyDeviceToHost));
}
static void test(const Spec& s){
  const int B=s.prefix.size(), Hq=s.kvh*s.gh, D=s.dim;
  std::vector<int> req,pre; std::vector<std::vector<int>> paths;
  int maxslots=0;
  for(int b=0;b<B;++b){ int most=0; for(auto& pa: s.trees[b]){ req.push_back(b); pre.push_back(s.prefix[b]); paths.push_back(pa); for(int n:pa) most=std::max(most,n+1);} maxslots=std::max(maxslots,s.prefix[b]+most);}  
  const int R=req.size(), cap=std::max(R,s.capRows);
  const int M=(maxslots+s.page-1)/s.page+1, pages=B*M+3;
  std::vector<int> order(pages); for(int i=0;i<pages;++i) order[i]=i; std::shuffle(order.begin(),order.end(),rng);
  std::vector<int> table(B*M); for(int i=0;i<B*M;++i) table[i]=order[i];
  const u16 nan=0x7fff; std::vector<u16> k((size_t)pages*s.kvh*s.page*D,nan), v(k.size(),nan);
  for(int b=0;b<B;++b){ int most=s.prefix[b]; for(auto& pa: s.trees[b]) for(int n:pa) most=std::max(most,s.prefix[b]+n+1);
    for(int slot=0;slot<most;++slot) for(int h=0;h<s.kvh;++h){ size_t o=(((size_t)table[b*M+slot/s.page]*s.kvh+h)*s.page+slot%s.page)*D; for(int d=0;d<D;++d){k[o+d]=tobf(gauss()); v[o+d]=tobf(gauss());}}}
  std::vector<u16> q((size_t)cap*Hq*D); for(auto&x:q) x=tobf(gauss()*2.5f);
  std::vector<int> preq=req,ppre=pre; preq.resize(cap,-7777); ppre.resize(cap,-7777);
  std::vector<int64_t> words(cap,-1); int depth=1; for(auto&pa:paths) depth=std::max<int>(depth,pa.size()+1);
  std::vector<int> plist((size_t)cap*depth,-1);
  for(int r=0;r<R;++r){uint64_t w=0; for(int n:paths[r]) if(n<64) w|=1ull<<n; words[r]=(int64_t)w; for(size_t i=0;i<paths[r].size();++i) plist[(size_t)r*depth+i]=paths[r][i];}
  AttentionParams p{}; p.dtype=DType::kBF16; u16 *dq=up(q),*dk=up(k),*dv=up(v); p.q=dq;p.k_pool=dk;p.v_pool=dv; int*dt=up(table),*dr=up(preq),*dp=up(ppre); p.block_table=dt;p.row_request=dr;p.row_prefix=dp;
  int64_t* dw=up(words); int* dl=up(plist); if(s.form==1)p.ancestors=dw; if(s.form==2){p.paths=dl;p.path_depth=depth;}
  p.scale=1.0f/std::sqrt((float)D); p.window=s.window; int* dn=up(std::vector<int>{R}); p.num_rows=dn;
  const int chunks=(M*s.page+255)/256; std::vector<int> plan0(plan_ints(cap),0); int* dplan=up(plan0); p.plan=dplan;
  std::vector<float> ws((size_t)cap*Hq*chunks*(D+2),NAN); float* dws=up(ws); p.workspace=dws;
  std::vector<u16> out0((size_t)cap*Hq*D); u16* dout=up(out0); p.out=dout;
  p.rows=cap;p.requests=s.requestsSaid?s.requestsSaid:B;p.q_heads=Hq;p.kv_heads=s.kvh;p.head_dim=D;p.page=s.page;p.max_pages=M;p.pages=pages;
  std::vector<u16> got; run(p,got,2);
  int bad=0,bits=0; double worst=0;
  for(size_t i=(size_t)R*Hq*D;i<got.size();++i) if(got[i]!=0xffff){++bad;}
  if(bad) printf("  rows past num_rows written: %d\n",bad);
  for(int r=0;r<R;++r){
    const int b=req[r]; std::vector<int> seen; for(int i=0;i<pre[r];++i) seen.push_back(i); for(int n:paths[r]) seen.push_back(pre[r]+n);
    const int len=seen.size(); int first=s.window>0?std::max(0,len-s.window):0;
    if(R<=40||r%5==0||r==R-1){ for(int h=0;h<Hq;++h){ int kh=h/s.gh; std::vector<double> sc; double mx=-1e300; for(int t=first;t<len;++t){ size_t o=(((size_t)table[b*M+seen[t]/s.page]*s.kvh+kh)*s.page+seen[t]%s.page)*D; double x=0; for(int d=0;d<D;++d) x+=(double)fromf(q[((size_t)r*Hq+h)*D+d])*fromf(k[o+d]); x*=p.scale; sc.push_back(x); mx=std::max(mx,x);} double tot=0; std::vector<double> o(D,0); for(int t=first;t<len;++t){ double e=exp(sc[t-first]-mx); tot+=e; size_t of=(((size_t)table[b*M+seen[t]/s.page]*s.kvh+kh)*s.page+seen[t]%s.page)*D; for(int d=0;d<D;++d) o[d]+=e*fromf(v[of+d]); }
      double err=0,norm=0; for(int d=0;d<D;++d){ double ref=len?o[d]/tot:0, g=fromf(got[((size_t)r*Hq+h)*D+d]); if(!(std::isfinite(g))) err=1e9; err+=(g-ref)*(g-ref); norm+=ref*ref;} double e=norm>0?std::sqrt(err/norm):err; if(e>worst) worst=e; if(e>1.2e-2&&bad++<4) printf("  WRONG row %d head %d len %d err %.3g\n",r,h,len,e); } }
    if(R<=20||r%7==0||r==R-1){ // straightened, alone, no path: own pool
      const int M2=(len+63)/64+1; std::vector<u16> k2((size_t)M2*s.kvh*64*D,nan),v2(k2.size(),nan); std::vector<int> t2(M2); for(int i=0;i<M2;++i)t2[i]=M2-1-i;
      for(int t=0;t<len;++t) for(int h=0;h<s.kvh;++h){ size_t a=(((size_t)t2[t/64]*s.kvh+h)*64+t%64)*D, o=(((size_t)table[b*M+seen[t]/s.page]*s.kvh+h)*s.page+seen[t]%s.page)*D; memcpy(&k2[a],&k[o],D*2); memcpy(&v2[a],&v[o],D*2);}      
      AttentionParams a=p; u16*ek=up(k2),*ev=up(v2); int*et=up(t2); int*er=up(std::vector<int>{0}),*ep=up(std::vector<int>{len}),*en=up(std::vector<int>{1}); a.k_pool=ek;a.v_pool=ev;a.block_table=et;a.row_request=er;a.row_prefix=ep;a.num_rows=en;a.ancestors=nullptr;a.paths=nullptr;a.path_depth=0;a.rows=1;a.requests=1;a.page=64;a.max_pages=M2;a.pages=M2;a.q=dq+(size_t)r*Hq*D;
      const int c2=(M2*64+255)/256; std::vector<float> w2((size_t)Hq*c2*(D+2),NAN); float* dw2=up(w2); a.workspace=dw2; int* pl=up(std::vector<int>(plan_ints(1),0)); a.plan=pl; u16* o2=up(std::vector<u16>((size_t)Hq*D)); a.out=o2;
      std::vector<u16> alone; run(a,alone);
      SPECRT_CUDA_CHECK(cudaMemset(o2,0xff,(size_t)Hq*D*2)); launch_prefill_attention_cuda(a,nullptr); SPECRT_CUDA_CHECK(cudaDeviceSynchronize()); std::vector<u16> pf((size_t)Hq*D); SPECRT_CUDA_CHECK(cudaMemcpy(pf.data(),o2,pf.size()*2,cudaMemcpyDeviceToHost));
      for(int i=0;i<Hq*D;++i){ u16 g=got[(size_t)r*Hq*D+i]; if(g!=alone[i]||g!=pf[i]){ if(bits++<4) printf("  BITS row %d head %d col %d len %d: tree %04x alone %04x prefill %04x\n",r,i/D,i%D,len,g,alone[i],pf[i]); } }
      for(void* x:{(void*)ek,(void*)ev,(void*)et,(void*)er,(void*)ep,(void*)en,(void*)dw2,(void*)pl,(void*)o2}) cudaFree(x);
    }
  }
  if(bad||bits) ++failures;
  printf("%s %s D%d kv%d gh%d page%d win%d form%d R%d cap%d: err %.1e\n",bad||bits?"FAIL":"ok  ",s.name,D,s.kvh,s.gh,s.page,s.window,s.form,R,cap,worst); fflush(stdout);
  for(void* x:{(void*)dq,(void*)dk,(void*)dv,(void*)dt,(void*)dr,(void*)dp,(void*)dw,(void*)dl,(void*)dn,(void*)dplan,(void*)dws,(void*)dout}) cudaFree(x);
}
static std::vector<std::vector<int>> tree(int n,double chain){ std::vector<std::vector<int>> t{{0}}; for(int i=1;i<n;++i){ int par= (rng()%1000)/1000.0<chain? i-1 : (int)(rng()%i); auto x=t[par]; x.push_back(i); t.push_back(x);} return t;}
int main(){
  auto one=[&](int n,double c){ return tree(n,c);};
  auto specs=[&](int dim,int kvh,int gh,int page,int win,int form,std::vector<int> pre,int n,double c,int cap,int said,const char*nm){ Spec s{dim,kvh,gh,page,win,form,pre,{},cap,said,nm}; for(size_t i=0;i<pre.size();++i){ auto t=one(n,c); if(form==0){ t.assign(1,{}); } s.trees.push_back(t);} test(s); };
  for(int dim:{128,64,96}) specs(dim,2,4,16,0,0,{1,15,16,63,64,65,255,256,257,2047,2048,2049,2300,0},1,1,0,0,"edges");
  specs(128,8,4,64,0,1,{1024},1,1,0,0,"decode"); specs(128,8,4,64,0,1,{1023,17,300,5000},1,1,0,0,"decode"); specs(128,2,4,64,0,0,{16384,9000},1,1,0,0,"long");
  specs(128,2,4,64,100,0,{16384,900,50},1,1,0,0,"win"); specs(64,2,1,32,7,0,{300,1},1,1,0,0,"win"); specs(128,2,4,64,2100,0,{16384,9000},1,1,0,0,"win");
  for(int pre:{0,5,50,200,250,1000,2030}) { specs(128,2,4,64,0,1,{pre},4,.7,4,1,"t16"); specs(64,2,4,16,0,1,{pre,pre+3},7,.7,0,0,"t32"); specs(128,2,4,32,0,1,{pre},15,.8,0,0,"t64"); specs(128,2,4,64,0,1,{pre},64,.5,0,0,"t128"); specs(128,1,4,64,0,1,{pre},64,1,0,0,"chain64"); specs(128,2,4,64,0,1,{pre},5,1,0,0,"chain5");}
  // capacities that say few rows while one request has many
  specs(128,2,4,16,0,1,{100,700},40,.6,80,80,"few cap"); specs(128,2,4,64,0,1,{700},64,.4,64,32,"few cap32"); specs(96,2,3,32,0,1,{250,40},20,.7,0,40,"few 96");
  for(int gh:{1,2,3,8,16}){ specs(128,2,gh,64,0,1,{250},9,.6,0,0,"gh"); specs(64,2,gh,16,0,1,{500},33,.6,0,0,"gh"); specs(128,2,gh,16,0,1,{500},33,.9,0,66,"gh few"); }
  for(int w:{1,7,64,100,300}){ specs(128,2,4,16,w,1,{3,250,2040},9,.6,0,0,"window"); specs(128,2,4,64,w,1,{3,250,2040},4,.6,0,0,"window"); specs(64,2,4,64,w,1,{700},64,.8,0,0,"window"); }
  for(int n:{10,80,180}) { specs(128,2,4,64,0,2,{100,251},n,.5,0,0,"paths"); specs(128,2,4,16,0,2,{1000},n,.8,0,0,"paths"); specs(64,2,4,64,0,2,{30},n,.2,0,n,"paths few"); }
  specs(128,8,4,64,0,1,{1024,1024,1024,700},64,.3,0,0,"verify b4"); specs(128,8,4,64,0,1,{4096},64,.5,0,0,"verify 4k"); specs(128,8,4,64,0,1,{9000},64,.5,0,0,"verify 9k");
  { Spec s{128,8,4,64,0,1,{},{},0,0,"b32"}; for(int i=0;i<32;++i){ s.prefix.push_back(1024+i*7); s.trees.push_back(tree(1,1)); } test(s); }
  { Spec s{128,8,4,64,0,1,{},{},0,0,"mixed"}; for(int i=0;i<12;++i){ s.prefix.push_back(100+i*177); s.trees.push_back(tree(1+(i*5)%9,.7)); } test(s); }
  printf("%d failures\n",failures); return failures!=0;
}
